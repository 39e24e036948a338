"""Speed, as ratios of times measured side by side."""

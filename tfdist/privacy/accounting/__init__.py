"""What private steps cost: ledgers, accountants, statements. No TensorFlow is needed here."""

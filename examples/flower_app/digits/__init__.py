"""Digits over the nodes of a Flower federation. Each node has images of few digits only.

With the server of Flower on port 8000:

    flower-superlink --insecure --disable-runtime-dependency-installation
    flower-supernode --insecure --superlink 127.0.0.1:8000 --port 9094 \
        --node-config "partition-id=0 num-partitions=2"
    flower-supernode --insecure --superlink 127.0.0.1:8000 --port 9095 \
        --node-config "partition-id=1 num-partitions=2"
    flwr run examples/flower_app FEDERATION --stream
"""

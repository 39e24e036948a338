"""Federated training on Flower: its server sends the rounds' weights, its clients train.

Both sides are a `fit` whose rounds are those of `tfdist.federated`. On a client, the only
client of a round is its own. On the server, clients are trained by a message. `messages.py`
is what travels, and imports Flower when an app is made. `nodes.py` asks nodes, `client.py`
and `server.py` are the two sides. `tfdist.flower` is what users import.
"""

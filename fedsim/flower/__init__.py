"""Deployment on Flower: the same strategies and clients on a SuperLink and SuperNodes.

The only package that imports ``flwr``; nothing else imports it, but the ``fedsim deploy`` command when it is called.
``server.app`` and ``client.app`` are the two apps that ``pyproject.toml`` names.
"""

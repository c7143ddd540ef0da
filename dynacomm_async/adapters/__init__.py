"""Adapters to other frameworks, each a module to import by name, with that framework installed.

:mod:`dynacomm_async.adapters.torch` trains a PyTorch module.
"""

"""Generators: frozen models that turn a condition into a picture, a sound or a clip."""

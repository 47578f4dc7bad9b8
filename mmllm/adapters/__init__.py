"""Adapters: few trained parameters in a frozen language model or encoder."""

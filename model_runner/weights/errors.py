"""The one exception of weight loading: its words are meant for the user. Imports nothing, so that any process may."""


class WeightsError(Exception):
    """Weights that cannot be read, or do not fit the model; the message names the file or the tensors."""

"""Students and the models that they come from. Importing this package registers the BiLSTM with transformers, so that
`AutoModelForTokenClassification` and the like open one that was saved; without transformers nothing is registered."""

from importlib.util import find_spec

if find_spec("transformers") is not None:
    from fastdistil.models import bilstm as bilstm

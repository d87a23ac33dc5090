"""One file per model family, named after `model_type`; each states only what differs from the common layout."""

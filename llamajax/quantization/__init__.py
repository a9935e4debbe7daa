"""A recipe applied to a model: which weight is quantized how, calibrated and resumed."""

"""Programs and weights for other runtimes. Depends on `llamajax` and `quant`; neither of them imports it."""

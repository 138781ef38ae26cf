"""The memory that a model takes and its highest speed, computed before its weights are fetched or read.

`shape` is a model without weights, `footprint` its bytes in a quantization, `choices` the quantizations that are
looked at; `hardware` is a device's memory and rates, `fit` what of a model fits there, `speed` the floor of a step.
`report` puts them together, `table` shows it, `refusal` is the same arithmetic just before a model is loaded. Numbers
in, numbers out: nothing here loads a model or writes anywhere.
"""

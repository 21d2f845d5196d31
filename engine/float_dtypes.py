"""Names of the floating-point dtypes that a model may run in, and that its weights may be stored in. No torch."""

from typing import Literal

FloatDtype = Literal["float32", "float16", "bfloat16"]  # by the names of torch and of config.json
ITEM_BYTES: dict[str, int] = {"float32": 4, "float16": 2, "bfloat16": 2}  # of one number
STORED_FLOATS = ("F32", "F16", "BF16")  # the same three, by the names of safetensors files
WIDER_STORED_FLOATS = ("F64", *STORED_FLOATS)  # of weights, which are rounded when they are loaded

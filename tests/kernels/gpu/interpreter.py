from triton_interpreter import *  # noqa
from triton_interpreter import TensorHandle, InterpreterBuilder, repair  # noqa

"""Every fact about devices: opening them, moving bytes, compiling programs, recording steps and replaying them.

Importing this package sets tinygrad's environment, so it must come before tinygrad does.
"""

from tinyvllm.device.environment import prepare_environment

prepare_environment()

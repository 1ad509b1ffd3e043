"""Tests of the engine on METAL, and the simulator that they run on where there is no Mac."""

plugin_name = "tests.metal.plugin"
reports_variable = "TINYVLLM_TEST_REPORTS"  # a file descriptor, for the process that runs the tests

"""Where people ask a model: the demo page, and the prompt of `dssk answer`."""

"""What an optimizer keeps from step to step: the active set, the progress of the run, their saved form."""

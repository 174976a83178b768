"""An epoch of training and what it measures, the recipe as functions of the step, and the state of a run."""

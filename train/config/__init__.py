"""The options, typed and checked, and how they are read. The ground of the house: it knows no model and no process."""

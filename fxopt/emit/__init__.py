"""From an edited graph to a module that people can read, run, save and export."""

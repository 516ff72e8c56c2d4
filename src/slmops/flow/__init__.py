"""From a project file to finished artifacts: read, plan, run, explain."""

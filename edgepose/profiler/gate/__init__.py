"""The gate: rules, the run that gathers what they ask for, the judgement, and the verdict in every format."""

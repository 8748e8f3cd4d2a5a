"""The rules by which records decide about published claims, one file per group of claims."""

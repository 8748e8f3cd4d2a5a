"""What a configuration would do on a cluster that is not here: a model, labelled `projected`."""

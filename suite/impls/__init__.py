"""The implementations, each behind the interface of `suite.impls.trainer`."""

"""Plain networks: generators, discriminators, classifiers."""

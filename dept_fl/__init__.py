"""DEPT: decoupled embeddings for pre-training language models, federated with Flower.

A silo is a place: its data, tokenizer, embeddings and training state stay there.
The transformer body is a traveller: it alone is sent and averaged.

Reading order: rounds, silo, variants, train, outer; then records and strategy.
"""

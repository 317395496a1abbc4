"""A teacher's next-token distributions on disk, for a training without the teacher: its likeliest tokens and what is left.

FOLDER/cache.json           whose logits these are, of which text, in which form (`facts.Facts`)
FOLDER/shard-00000.safetensors   of some windows: `ids` [w t k], `logs` [w t k] and `rest` [w t], see below
FOLDER/shard-00000.json     which windows, of which cache, and the file's size and hash (`facts.Shard`)

ids: the k likeliest tokens, the likeliest first, uint16 or uint32 by the vocabulary. logs: the logarithms of their
probabilities at the cache's temperature. rest: that of all others' together. Both float16: 2^-11 of a logarithm, so that
a probability is off by at most 0.4 % at e^-8, and less above; readers make them sum to 1.

w window    t time    k likeliest tokens
"""

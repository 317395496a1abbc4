"""Cached logits: a teacher's next-token distributions on disk, for training without the teacher.

FOLDER/cache.json           the teacher, the text and the format (`facts.Facts`)
FOLDER/shard-00000.safetensors   some windows: `ids` [w t k], `logs` [w t k] and `rest` [w t], see below
FOLDER/shard-00000.json     the windows' places, the cache's key, and the file's size and hash (`facts.Shard`)

ids: the k likeliest tokens, the likeliest first, uint16 or uint32 by the vocabulary. logs: the logarithms of their
probabilities at the cache's temperature. rest: the logarithm of the probability of all other tokens together. Both are
float16, with a relative error of at most 2^-11 of the logarithm: a probability of e^-8 is off by at most 0.4 %, a larger one
by less. Readers make the probabilities sum to 1.

w window    t time    k likeliest tokens
"""

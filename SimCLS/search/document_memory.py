"""What a decoder attends to of its documents, kept once per document and shared by its beams."""

import torch


class Memory:
    """The cross-attention keys and values of a few documents in each layer, padded to one length. Once all layers are
    added, these tensors are never written to, so copies of a Memory can share them.

    The decoder has no rows for ended beams, so `attend` places its rows in a table of documents x beams.
    """

    def __init__(self, lengths):
        self.lengths = lengths
        self.documents, self.beams, self.rows = len(lengths), 1, len(lengths)
        self.keys, self.values = [], []
        self.places = self.mask = None

    def add_layer(self, key_value):
        """key_value: [sum of lengths, 2, heads, head size]."""
        _, _, heads, size = key_value.shape
        keys = key_value.new_zeros(self.documents, heads, size, max(self.lengths))
        values = key_value.new_zeros(self.documents, heads, max(self.lengths), size)
        for document, part in enumerate(key_value.split(self.lengths)):
            keys[document, :, :, : len(part)] = part[:, 0].permute(1, 2, 0)
            values[document, :, : len(part)] = part[:, 1].transpose(0, 1)
        self.keys.append(keys)
        self.values.append(values)
        if self.mask is None and min(self.lengths) < max(self.lengths):
            position = torch.arange(max(self.lengths), device=keys.device)
            padding = position >= torch.tensor(self.lengths, device=keys.device).unsqueeze(1)
            self.mask = keys.new_zeros(padding.shape).masked_fill_(padding, float("-inf"))[:, None, None]

    def spread(self, beams):
        self.beams, self.rows = beams, self.documents * beams

    def keep(self, rows):
        """Drop all rows but these, int64 [rows to keep], and documents without any row left."""
        if len(rows) == self.rows:
            return
        self.rows = len(rows)
        places = rows if self.places is None else self.places[rows]
        documents, row_documents = torch.unique(places // self.beams, return_inverse=True)
        self.places = row_documents * self.beams + places % self.beams
        if len(documents) < self.documents:
            self.documents = len(documents)
            self.keys = [keys.index_select(0, documents) for keys in self.keys]
            self.values = [values.index_select(0, documents) for values in self.values]
            self.mask = None if self.mask is None else self.mask.index_select(0, documents)

    def attend(self, query, index):
        """Cross-attention in layer `index`. query and result: [rows, heads, head size]."""
        table = query
        if self.places is not None:
            table = query.new_zeros(self.documents * self.beams, *query.shape[1:]).index_copy_(0, self.places, query)
        table = table.unflatten(0, (self.documents, self.beams)).transpose(1, 2)
        weights = torch.matmul(table, self.keys[index])
        if self.mask is not None:
            weights += self.mask
        mixed = torch.matmul(weights.softmax(-1), self.values[index]).transpose(1, 2).flatten(0, 1)
        return mixed if self.places is None else mixed[self.places]

"""The legend of shape letters. A tensor named `hidden_TD` has shape [T, D].

    T  tokens that were really seen (padding removed)
    B  sequences in a batch            N  positions of a sequence, padding included
    S  slots: (token, expert) pairs the router chose, T * K, sorted by expert
    D  model width (hidden_size)       F  width of one expert's intermediate
    E  routed experts of a layer       K  experts per token (top-k)
    V  vocabulary                      L  decoder layers
    G  tasks (named data sets)
    O, I  output and input features of any linear layer

jaxtyping annotations use the same letters: `Float[Tensor, "T D"]`.
"""

"""How many heads share one of keys, and how wide they are."""


def divide_heads(
    dim: int, num_heads: int, shared: int | None, head_dim: int | None, *, name: str = "num_kv_heads"
) -> tuple[int, int]:
    """The number of shared heads, H where None, and the width of a head, D / H where None.

    Args:
        dim, num_heads: D, H.
        shared, name: what divides H, and as what the caller has it.
        head_dim: P.

    Raises:
        ValueError: they do not divide.
    """
    if shared is None:
        shared = num_heads
    if num_heads < 1 or shared < 1 or num_heads % shared:
        raise ValueError(f"{name} must divide num_heads = {num_heads}, got {shared}")
    if head_dim is None:
        if dim % num_heads:
            raise ValueError(f"head_dim must be given where num_heads = {num_heads} does not divide {dim}")
        head_dim = dim // num_heads
    return shared, head_dim

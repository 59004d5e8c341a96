"""Auxiliary losses of gates. Pure functions, without coefficients, all in float32.

T tokens, E experts, K experts per token; f_E assignments to each expert divided by tokens, so that f sums to K.
"""

import torch

SMALLEST_STD = 1e-6  # lower bound for a divisor: below it the quotient's gradient becomes NaN


def load_balance_loss(f_E: torch.Tensor, mean_probs_E: torch.Tensor) -> torch.Tensor:
    """E Σ f_i P_i: K when balanced, more otherwise (Switch Transformer, equations 4 to 6)."""
    return f_E.shape[0] * torch.sum(f_E * mean_probs_E)


def sequence_balance_loss(
    chosen_TK: torch.Tensor, probs_TE: torch.Tensor, sequence_ids_T: torch.Tensor
) -> torch.Tensor:
    """Mean over sequences of Σ f_i P_i, with f normalized so that balance gives 1 (DeepSeek-V3, equations 17 to 20).

    chosen_TK: int64 in [0, E). probs_TE: affinities that sum to 1. sequence_ids_T: int64, each token's sequence.
    """
    num_experts, top_k = probs_TE.shape[1], chosen_TK.shape[1]
    _, sequence_T, lengths_S = torch.unique(sequence_ids_T, return_inverse=True, return_counts=True)
    shape = (lengths_S.shape[0], num_experts)
    cells_TK = sequence_T[:, None] * num_experts + chosen_TK
    counts_SE = torch.bincount(cells_TK.flatten(), minlength=shape[0] * num_experts).view(shape).float()
    f_SE = counts_SE * num_experts / (top_k * lengths_S[:, None])
    mean_probs_SE = probs_TE.new_zeros(shape).index_add(0, sequence_T, probs_TE) / lengths_S[:, None]
    return torch.sum(f_SE * mean_probs_SE, dim=1).mean()


def z_loss(logits_TE: torch.Tensor) -> torch.Tensor:
    """Mean of the squared logarithm of the softmax denominator (ST-MoE, equation 5)."""
    return torch.logsumexp(logits_TE, dim=-1).square().mean()


def entropy(probs_TE: torch.Tensor) -> torch.Tensor:
    """Mean entropy of a token's distribution over experts, in nats."""
    tiny = torch.finfo(probs_TE.dtype).tiny  # p log p has no finite gradient where p underflowed to 0
    return -torch.xlogy(probs_TE, probs_TE.clamp(min=tiny)).sum(dim=-1).mean()


def cv_squared(x_E: torch.Tensor) -> torch.Tensor:
    """Squared coefficient of variation, variance / mean²; 0 for a single expert or an all-zero vector."""
    return x_E.var(unbiased=False) / (x_E.mean().square() + 1e-10)


def smooth_load(clean_TE: torch.Tensor, noisy_TE: torch.Tensor, std_TE: torch.Tensor, top_k: int) -> torch.Tensor:
    """Load_E = Σ_t P(expert i stays in the top-k when its noise is redrawn), differentiable.

    Φ((clean_i - kth_excluding(noisy, k, i)) / std_i) (Shazeer et al. 2017, appendix A, equations 8 to 10).
    With K = E no expert can drop out, and every expert has load T.
    """
    num_tokens, num_experts = clean_TE.shape
    if top_k == num_experts:
        return clean_TE.new_full((num_experts,), float(num_tokens))
    best = noisy_TE.topk(top_k + 1, dim=-1).values
    last_in, first_out = best[:, top_k - 1, None], best[:, top_k, None]
    kth_excluding_TE = torch.where(noisy_TE > first_out, first_out, last_in)
    stays_TE: torch.Tensor = torch.special.ndtr((clean_TE - kth_excluding_TE) / std_TE.clamp(min=SMALLEST_STD))
    return stays_TE.sum(dim=0)

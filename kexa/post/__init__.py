"""Post-training: SFT, AGAPO on verifiable tasks, GROUPER on preferences, in that order.

chat format (kexa.data.chat) -> sft -> tasks, rewards, rollout, agapo -> judge, grouper
"""

from kexa.post.agapo import agapo_advantages, agapo_loss, importance_ratios, informative_groups
from kexa.post.grouper import grouper_advantages, grouper_loss, inverse_perplexity

__all__ = [
    "agapo_advantages",
    "agapo_loss",
    "grouper_advantages",
    "grouper_loss",
    "importance_ratios",
    "informative_groups",
    "inverse_perplexity",
]

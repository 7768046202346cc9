"""Hidden-state capture, resume from a block, lockstep passes and scoring (room 3)."""

from midblock.capture.forward import (
    Lockstep,
    forwards_replaced,
    model_inputs,
    resume_at,
    run_blocks,
    run_layer_major,
    verify_resume,
)
from midblock.capture.scoring import (
    TokenScores,
    chunks_of_logits,
    counted_positions,
    next_token_scores,
    sample_means,
)

__all__ = ["Lockstep", "TokenScores", "chunks_of_logits", "counted_positions", "forwards_replaced", "model_inputs",
           "next_token_scores", "resume_at", "run_blocks", "run_layer_major", "sample_means", "verify_resume"]

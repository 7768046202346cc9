"""Hidden-state capture, interventions, resume from a block, lockstep passes and scoring (room 3)."""

from midblock.capture.blockwise import (
    BlockByBlock,
    block_by_block,
    room_for_hidden_states,
    run_layer_major,
    score_batches,
)
from midblock.capture.forward import Lockstep, model_inputs, run_blocks
from midblock.capture.hidden_states import HiddenStates
from midblock.capture.interventions import outputs_changed, patched, resume_at, steered, swap_blocks
from midblock.capture.resume import verify_resume, why_not_resume
from midblock.capture.scoring import RowScores, chunks_of_logits, counted_positions, score_batch, score_hidden

__all__ = ["BlockByBlock", "HiddenStates", "Lockstep", "RowScores", "block_by_block", "chunks_of_logits",
           "counted_positions", "model_inputs", "outputs_changed", "patched", "resume_at", "room_for_hidden_states",
           "run_blocks", "run_layer_major", "score_batch", "score_batches", "score_hidden", "steered", "swap_blocks",
           "verify_resume", "why_not_resume"]

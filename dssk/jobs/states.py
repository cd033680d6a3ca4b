"""Every state that a scheduler can report, as one of the five that haven and we decide by."""

QUEUED, RUNNING, COMPLETED, FAILED, CANCELLED = "QUEUED", "RUNNING", "COMPLETED", "FAILED", "CANCELLED"
ALIVE = (QUEUED, RUNNING)
NEVER_LAUNCHED = "NEVER LAUNCHED"  # haven's word
GONE = "GONE"  # the scheduler knows the job no longer, and the job left no word of its end

# Slurm's states as `man squeue` and `man sacct` list them, and the toolkit's.
STATES = {
    QUEUED: "PENDING CONFIGURING POWER_UP_NODE REQUEUED REQUEUE_FED REQUEUE_HOLD RESV_DEL_HOLD RECONFIG_FAIL "
    "SPECIAL_EXIT QUEUING QUEUED",
    RUNNING: "RUNNING COMPLETING RESIZING SIGNALING STAGE_OUT STOPPED SUSPENDED UPDATE_DB CANCELLING",
    COMPLETED: "COMPLETED SUCCEEDED",
    FAILED: "FAILED BOOT_FAIL DEADLINE LAUNCH_FAILED NODE_FAIL OUT_OF_MEMORY PREEMPTED TIMEOUT INTERRUPTED "
    + GONE,
    CANCELLED: "CANCELLED REVOKED",
}
_STATE_OF = {name: state for state, names in STATES.items() for name in names.split()}


def state_of(reported: str) -> str:
    """One of the five for what a scheduler reported (`CANCELLED by 1000`); one never heard of counts as failed."""
    words = reported.split()
    return _STATE_OF.get(words[0].rstrip("+"), FAILED) if words else FAILED

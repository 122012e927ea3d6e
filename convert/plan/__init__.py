"""The plan of a conversion: every tensor that will be written, and the memory, disk space and time
that this will need, known before the first byte is written.

Entry points: `conversion_plan.plan_model`, `compatibility.require_compatible`, `estimate.writing_phase` and
`machine.require_resources`.
"""

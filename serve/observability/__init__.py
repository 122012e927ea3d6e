"""Observability of a server: metrics of each replica and the exporter that offers them, logs and traces.

Entry points: `recorder.MetricsRecorder`, `exporter.Exporter`, `logs.set_up`, `access_log.AccessLog` and
`tracing.tracer_of`.
"""

"""The systems, whole: from data and a teacher on disk to a saved student and its report, one `run(config)` each."""

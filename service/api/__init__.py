"""HTTP: routes, bodies, answers, and who may call. What a command does is the engine's business."""

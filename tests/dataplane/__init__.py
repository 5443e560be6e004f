"""The data plane: worker processes on the real kernel, and the formats that they and the supervisor share."""

/* Errors: the errno that core and daemon speak, and gRPC's code for it on the wire (docs/rpc.md,
 * section 4). The errno itself travels in the trailer `winnow-reason`; the code is for stock
 * clients. Thread: any. */
#pragma once

/* gRPC's status codes, by their numbers on the wire. */
enum winnow_code {
    WINNOW_CODE_OK = 0,
    WINNOW_CODE_CANCELLED = 1,
    WINNOW_CODE_INVALID_ARGUMENT = 3,
    WINNOW_CODE_DEADLINE_EXCEEDED = 4,
    WINNOW_CODE_NOT_FOUND = 5,
    WINNOW_CODE_PERMISSION_DENIED = 7,
    WINNOW_CODE_RESOURCE_EXHAUSTED = 8,
    WINNOW_CODE_FAILED_PRECONDITION = 9,
    WINNOW_CODE_ABORTED = 10,
    WINNOW_CODE_UNIMPLEMENTED = 12,
    WINNOW_CODE_INTERNAL = 13,
    WINNOW_CODE_UNAVAILABLE = 14,
    WINNOW_CODE_DATA_LOSS = 15,
    WINNOW_CODE_UNAUTHENTICATED = 16,
};

/* Of 0 or -errno; INTERNAL for an errno that no table row names. */
enum winnow_code winnow_error_code(int error);

/*
 * One line an event on stderr: "event key=value ...", with a level as journald reads it (<4>) or
 * a UTC time when stderr is no journal. Only daemon/ logs.
 *
 * A repeated reason is limited: its first line at once, then one each 10 s with its count
 * (repeated=214). Thread: any.
 */
#pragma once

enum winnow_log_level {
    WINNOW_LOG_ERROR = 3,   /* act */
    WINNOW_LOG_WARNING = 4, /* look */
    WINNOW_LOG_NOTICE = 5,  /* start, stop, mode */
    WINNOW_LOG_INFO = 6,    /* hourly */
};

/* `event` is a word and the key of the limit; `format` gives the key=value pairs. */
void winnow_log(enum winnow_log_level level, const char *event, const char *format, ...)
    __attribute__((format(printf, 3, 4)));

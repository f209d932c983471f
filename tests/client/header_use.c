/* Compiled as C and as C++ by test_header.sh: an engine in either can include winnow/winnow.h. */
#include <winnow/winnow.h>

int main(void)
{
    winnow_client_options client = WINNOW_CLIENT_OPTIONS;
    winnow_session_options session = WINNOW_SESSION_OPTIONS;
    winnow_stats stats = WINNOW_STATS;
    return client.struct_bytes != sizeof client || session.struct_bytes != sizeof session ||
           session.mass != 0 || stats.struct_bytes != sizeof stats;
}

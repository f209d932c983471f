#include "trace.h"

#include <base/alloc.h>
#include <errno.h>
#include <glob.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { RAW_WIDTH = 64, RAW_N_Q = 3 };

/* fp16 numbers of a file, and the shape its header states ({0}: none, a raw file). */
struct array {
    uint16_t *data;
    size_t n;
    uint32_t shape[3];
};

static int compare_paths(const void *a, const void *b)
{
    return strcmp(a, b);
}

static int list_add(struct winnow_trace_list *list, const char *directory, const char *pattern)
{
    char wanted[512];
    glob_t found;

    snprintf(wanted, sizeof wanted, "%s/%s", directory, pattern);
    int rc = glob(wanted, 0, NULL, &found);
    if (rc != 0)
        return rc == GLOB_NOSPACE ? -ENOMEM : 0;
    size_t n_bytes = (list->n_paths + found.gl_pathc) * sizeof *list->path;
    void *grown = realloc(list->path, n_bytes);
    if (grown)
        list->path = grown;
    for (size_t i = 0; grown && i < found.gl_pathc; i++)
        snprintf(list->path[list->n_paths++], sizeof *list->path, "%s", found.gl_pathv[i]);
    globfree(&found);
    return grown ? 0 : -ENOMEM;
}

int winnow_trace_list_open(const char *directory, struct winnow_trace_list *list)
{
    *list = (struct winnow_trace_list){0};
    int rc = list_add(list, directory, "*/layer*_K.npy");
    if (rc == 0)
        rc = list_add(list, directory, "*_layer*_K.f16");
    if (rc == 0 && list->n_paths == 0)
        rc = -ENOENT;
    if (rc < 0) {
        winnow_trace_list_close(list);
        return rc;
    }
    qsort(list->path, list->n_paths, sizeof *list->path, compare_paths);
    return 0;
}

void winnow_trace_list_close(struct winnow_trace_list *list)
{
    free(list->path);
    *list = (struct winnow_trace_list){0};
}

static int read_file(const char *path, char **ret_data, size_t *ret_bytes)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        return -errno;
    int rc = -EIO;
    if (fseek(file, 0, SEEK_END) == 0) {
        size_t n_bytes = (size_t)ftell(file);
        char *data = malloc(n_bytes + 1);
        rewind(file);
        if (!data) {
            rc = -ENOMEM;
        } else if (fread(data, 1, n_bytes, file) != n_bytes) {
            free(data);
        } else {
            data[n_bytes] = 0;
            *ret_data = data;
            *ret_bytes = n_bytes;
            rc = 0;
        }
    }
    fclose(file);
    return rc;
}

/* The header of NumPy's format 1.0: magic, version, u16 of its length, a Python dictionary. */
static int parse_npy(const char *data, size_t n_bytes, struct array *array, size_t *ret_offset)
{
    if (n_bytes < 10 || memcmp(data, "\x93NUMPY\x01", 7))
        return -EINVAL;
    size_t offset = 10 + (size_t)((uint8_t)data[8] | (uint8_t)data[9] << 8);
    char header[512];
    if (offset > n_bytes || offset - 10 >= sizeof header)
        return -EINVAL;
    memcpy(header, data + 10, offset - 10);
    header[offset - 10] = 0;
    const char *shape = strstr(header, "'shape': (");
    if (!strstr(header, "'<f2'") || !strstr(header, "'fortran_order': False") || !shape ||
        sscanf(shape, "'shape': (%u, %u, %u", &array->shape[0], &array->shape[1],
               &array->shape[2]) < 2)
        return -EINVAL;
    *ret_offset = offset;
    return 0;
}

static int read_array(const char *path, struct array *array)
{
    char *data = NULL;
    size_t n_bytes = 0, offset = 0;

    *array = (struct array){0};
    int rc = read_file(path, &data, &n_bytes);
    if (rc < 0)
        return rc;
    if (strstr(path, ".npy"))
        rc = parse_npy(data, n_bytes, array, &offset);
    if (rc < 0) {
        free(data);
        return rc;
    }
    memmove(data, data + offset, n_bytes - offset);
    array->data = (uint16_t *)data;
    array->n = (n_bytes - offset) / 2;
    return 0;
}

/* Reads the file of K, V or Q that belongs to the path of K, as fp32. */
static int read_part(const char *path, char part, float **ret_data, struct array *array)
{
    char part_path[512];

    snprintf(part_path, sizeof part_path, "%s", path);
    part_path[strlen(part_path) - 5] = part;
    int rc = read_array(part_path, array);
    if (rc < 0)
        return rc;
    *ret_data = winnow_alloc_array(array->n, sizeof **ret_data);
    rc = *ret_data ? winnow_kernels_ref()->to_float(WINNOW_FP16, array->n, array->data, *ret_data)
                   : -ENOMEM;
    free(array->data);
    return rc < 0 ? (rc == -EDOM ? -EINVAL : rc) : 0;
}

/* "DIR/history/layer21_head2_K.npy" and "DIR/history_layer21_head2_K.f16": history/layer21_head2 */
static void trace_name(const char *path, char name[64])
{
    const char *at = strrchr(path, '/');
    if (strstr(path, ".npy"))
        while (at > path && at[-1] != '/')
            at--;
    at += *at == '/';
    snprintf(name, 64, "%.*s", (int)(strlen(at) - strlen("_K.npy")), at);
    char *layer = strstr(name, "_layer");
    if (layer)
        *layer = '/';
}

int winnow_trace_open(const char *path, struct winnow_trace *trace)
{
    struct array k, v, q;

    *trace = (struct winnow_trace){0};
    trace_name(path, trace->name);
    int rc = read_part(path, 'K', &trace->k, &k);
    if (rc == 0)
        rc = read_part(path, 'V', &trace->v, &v);
    if (rc == 0)
        rc = read_part(path, 'Q', &trace->q, &q);
    if (rc == 0) {
        trace->width = k.shape[1] ? k.shape[1] : RAW_WIDTH;
        trace->n_q = q.shape[1] ? q.shape[1] : RAW_N_Q;
        trace->n_tokens = (uint32_t)(k.n / trace->width);
        trace->n_steps = (uint32_t)(q.n / trace->n_q / trace->width);
        if (v.n != k.n || trace->n_steps > trace->n_tokens || trace->n_steps == 0)
            rc = -EINVAL;
    }
    if (rc < 0)
        winnow_trace_close(trace);
    return rc;
}

void winnow_trace_close(struct winnow_trace *trace)
{
    winnow_alloc_free(trace->k);
    winnow_alloc_free(trace->v);
    winnow_alloc_free(trace->q);
    *trace = (struct winnow_trace){0};
}

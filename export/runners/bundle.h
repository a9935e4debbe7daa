/* Reads a bundle from C: its manifest and its safetensors files. A damaged file ends the program with a message. */

#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "pjrt_c_api.h"

enum { MOST_AXES = 8 };

typedef struct { const char *at, *end; } Text; /* JSON, or a file; nothing after its end is read */
typedef struct { const char *data; PJRT_Buffer_Type type; int64_t axes[MOST_AXES], bytes; size_t rank; } Array;

#define FAIL(...) (fprintf(stderr, __VA_ARGS__), fputc('\n', stderr), exit(1))

/* Maps a file of the bundle, which is the current folder, into memory. It must be a regular file, not a link. */
static Text map(const char *name) {
  struct stat info = {0};
  int file = *name == '/' || strstr(name, "..") ? -1 : open(name, O_RDONLY | O_NONBLOCK | O_NOFOLLOW);
  int regular = !fstat(file, &info) && S_ISREG(info.st_mode);
  char *data = regular ? mmap(NULL, (size_t)info.st_size, PROT_READ, MAP_PRIVATE, file, 0) : MAP_FAILED;
  if (data == MAP_FAILED) FAIL("%s: expected a regular file of a bundle", name);
  return (Text){data, data + info.st_size};
}

/* Takes the next value from `rest`: a string without its quotes; an empty text at the end. */
static Text next(Text *rest) {
  int depth = 0, quoted = 0;
  while (rest->at < rest->end && memchr(" \t\r\n,:", *rest->at, 6)) rest->at++;
  Text value = *rest;
  for (; rest->at < rest->end; rest->at++) {
    char c = *rest->at;
    if (!quoted && !depth && memchr(" \t\r\n,:]}", c, 8)) break;
    if (quoted && c == '\\' && rest->at + 1 < rest->end) rest->at++;
    else if (c == '"') quoted = !quoted;
    else if (!quoted) depth += (c == '{' || c == '[') - (c == '}' || c == ']');
  }
  value.end = rest->at;
  return value.end - value.at >= 2 && *value.at == '"' ? (Text){value.at + 1, value.end - 1} : value;
}

/* The text between the brackets of the next value. */
static Text inside(Text rest) {
  Text value = next(&rest);
  if (value.end - value.at < 2 || !memchr("{[", *value.at, 2)) FAIL("damaged JSON: expected a list or an object");
  return (Text){value.at + 1, value.end - 1};
}

/* A copy that ends with a zero byte. */
static char *string(Text text) {
  char *copy = strndup(text.at, (size_t)(text.end - text.at));
  if (!copy) FAIL("no memory");
  return copy;
}

/* The value of a key of an object; an empty text if the object has no such key. */
static Text optional(Text object, const char *key) {
  Text rest = inside(object), name, value;
  size_t length = strlen(key);
  do name = next(&rest), value = next(&rest);
  while (name.at < name.end && ((size_t)(name.end - name.at) != length || memcmp(name.at, key, length)));
  return value;
}

static Text member(Text object, const char *key) {
  Text value = optional(object, key);
  if (value.at == value.end) FAIL("no %s: expected the manifest and the tensors of a bundle", key);
  return value;
}

static int64_t number(Text digits) {
  int64_t result = 0;
  for (const char *c = digits.at; c < digits.end; result = 10 * result + (*c++ - '0'))
    if (*c < '0' || *c > '9' || result > INT64_MAX / 16) FAIL("damaged JSON: expected a whole number");
  return result;
}

/* Dtype and shape of an array from its entry in the manifest or a safetensors header, without data. */
static Array described(Text entry) {
  static const struct { const char *names[2]; PJRT_Buffer_Type type; int bytes; } types[] = {
      {{"uint8", "U8"}, PJRT_Buffer_Type_U8, 1},      {{"int32", "I32"}, PJRT_Buffer_Type_S32, 4},
      {{"float16", "F16"}, PJRT_Buffer_Type_F16, 2},  {{"float32", "F32"}, PJRT_Buffer_Type_F32, 4},
      {{"bfloat16", "BF16"}, PJRT_Buffer_Type_BF16, 2}};
  Array array = {0};
  char *name = string(member(entry, "dtype"));
  for (size_t i = 0; i < sizeof types / sizeof *types; i++)
    if (!strcmp(name, types[i].names[0]) || !strcmp(name, types[i].names[1]))
      array.type = types[i].type, array.bytes = types[i].bytes;
  if (!array.bytes) FAIL("dtype %s: expected uint8, int32 or a float", name);
  free(name);
  Text axes = inside(member(entry, "shape"));
  for (Text axis = next(&axes); axis.at < axis.end; axis = next(&axes)) {
    int64_t size = number(axis);
    if (array.rank == MOST_AXES || __builtin_mul_overflow(array.bytes, size, &array.bytes)) FAIL("a shape too large");
    array.axes[array.rank++] = size;
  }
  return array;
}

/* An array of a safetensors file. */
static Array tensor(Text file, const char *name) {
  uint64_t length = 0, room = (uint64_t)(file.end - file.at);
  if (room >= 8) memcpy(&length, file.at, 8);
  if (room < 8 || length > room - 8) FAIL("damaged safetensors file: its header is longer than the file");
  Text header = {file.at + 8, file.at + 8 + length}, entry = member(header, name);
  Text offsets = inside(member(entry, "data_offsets"));
  Array array = described(entry);
  int64_t first = number(next(&offsets)), last = number(next(&offsets));
  if (last > file.end - header.end || last - first != array.bytes) FAIL("%s: damaged", name);
  array.data = header.end + first;
  return array;
}

/* Compiles and runs a bundle's programs with XLA, without Python, through the PJRT C API of a plugin.

     gcc -O2 -Wall -Wextra -I HEADERS -o pjrt pjrt.c -ldl      HEADERS: where pjrt_c_api.h is (XLA's xla/pjrt/c)

     ./pjrt PLUGIN.so BUNDLE                                   runs a golden prompt on the plugin's first device
     ./pjrt PLUGIN.so BUNDLE PROGRAM TOPOLOGY [NAME=VALUE ...] compiles for a device that is not here

     TPU_SKIP_MDS_QUERY=1 ./pjrt libtpu.so box.bundle decode v5e:2x2
     ./pjrt xla_cuda_plugin.so box.bundle decode h100 topology=1x1x1 "target_config=$(cat h100.txt)"

   A program is passed unchanged: format "mlir" accepts StableHLO portable artifacts. A run feeds the prompt to `decode`
   token by token; then greedy choice must give the bundle's golden tokens. Hashes of files are not checked here.

   Tested: compilation, with libtpu for v4, v5e, v5p, v6e and 7x, and with the CUDA plugin for an H100. NOT tested:
   running on a device. No plugin for CPUs is published; a stand-in that computes nothing received the same calls. */

#include "bundle.h"

#include <dlfcn.h>
#include <unistd.h>

enum { MOST_ARGUMENTS = 1 << 14, MOST_OPTIONS = 16, MOST_STATE = 256 };
/* CompileOptionsProto { executable_build_options { device_ordinal: -1 num_replicas: 1 num_partitions: 1 } } */
static char COMPILE_OPTIONS[] = "\x1a\x0f\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01\x20\x01\x28\x01";
static const size_t COMPILE_SIZE = sizeof COMPILE_OPTIONS - 1;
static const PJRT_Api *api;

/* Declares `args` and calls `function` with it; the results are fields of `args`. */
#define CALL(args, function, ...)                                                    \
  function##_Args args = {.struct_size = function##_Args_STRUCT_SIZE, __VA_ARGS__};  \
  check(api->function(&args), #function)

static void check(PJRT_Error *error, const char *call) {
  PJRT_Error_Message_Args text = {.struct_size = PJRT_Error_Message_Args_STRUCT_SIZE, .error = error};
  if (!error) return;
  api->PJRT_Error_Message(&text);
  FAIL("%s: %.*s", call, (int)text.message_size, text.message);
}

static void finish(PJRT_Event *event) {
  CALL(await, PJRT_Event_Await, .event = event);
  CALL(destroy, PJRT_Event_Destroy, .event = event);
}

static PJRT_Buffer *put(PJRT_Client *client, PJRT_Device *device, Array array) {
  CALL(copy, PJRT_Client_BufferFromHostBuffer, .client = client, .device = device, .data = array.data,
       .type = array.type, .dims = array.axes, .num_dims = array.rank);
  finish(copy.done_with_host_buffer);
  return copy.buffer;
}

static void replace(PJRT_Buffer **place, PJRT_Buffer *buffer) {
  CALL(destroy, PJRT_Buffer_Destroy, .buffer = *place);
  *place = buffer;
}

static void compile(PJRT_Program *program, const char *name, char **given, int count) {
  PJRT_NamedValue options[MOST_OPTIONS];
  for (int i = 0; i < count; i++) {
    const char *sign = strchr(given[i], '=');
    if (!sign || i == MOST_OPTIONS) FAIL("%s: expected at most %d of NAME=VALUE", given[i], MOST_OPTIONS);
    options[i] = (PJRT_NamedValue){.struct_size = PJRT_NamedValue_STRUCT_SIZE, .type = PJRT_NamedValue_kString,
        .name = given[i], .name_size = (size_t)(sign - given[i]), .string_value = sign + 1,
        .value_size = strlen(sign + 1)};
  }
  CALL(topology, PJRT_TopologyDescription_Create, .topology_name = name, .topology_name_size = strlen(name),
       .create_options = options, .num_options = (size_t)count);
  CALL(made, PJRT_Compile, .topology = topology.topology, .program = program, .compile_options = COMPILE_OPTIONS,
       .compile_options_size = COMPILE_SIZE);
  CALL(memory, PJRT_Executable_GetCompiledMemoryStats, .executable = made.executable);
  printf("%s: bytes of arguments %lld, aliased %lld, temporary %lld, code %lld\n", name,
         (long long)memory.argument_size_in_bytes, (long long)memory.alias_size_in_bytes,
         (long long)memory.temp_size_in_bytes, (long long)memory.generated_code_size_in_bytes);
}

/* The number of arrays of the state. Manifests of the first releases do not describe it: it is keys and values. */
static size_t state_count(Text manifest) {
  Text state = optional(member(manifest, "cache"), "state");
  size_t count = state.at == state.end ? 2 : 0;
  if (count) return count;
  for (Text rest = inside(state), value = next(&rest); value.at < value.end; value = next(&rest)) count++;
  if (count < 1 || count > MOST_STATE) FAIL("%zu arrays of state: expected 1 to %d", count, MOST_STATE);
  return count;
}

static int run(PJRT_Program *program, Text manifest, Text entry) {
  static PJRT_Buffer *arguments[MOST_ARGUMENTS], *results[1 + MOST_STATE];
  size_t count = 0, states = state_count(manifest);
  int32_t token = 0, length = 0, wrong = 0;
  CALL(made, PJRT_Client_Create, .num_options = 0);
  CALL(devices, PJRT_Client_AddressableDevices, .client = made.client);
  if (!devices.num_addressable_devices) FAIL("the plugin has no device here: name a topology to compile for");
  PJRT_Device *device = devices.addressable_devices[0];
  CALL(compiled, PJRT_Client_Compile, .client = made.client, .program = program, .compile_options = COMPILE_OPTIONS,
       .compile_options_size = COMPILE_SIZE);
  Text kind = member(entry, "weights");
  if (kind.end - kind.at != 6 || memcmp(kind.at, "packed", 6)) FAIL("expected an export with --profile=scanned");
  Text file = map("weights.safetensors"), golden = map("golden.safetensors");
  Text weights = inside(member(manifest, "weights"));
  for (Text weight = next(&weights); weight.at < weight.end; weight = next(&weights)) {
    if (count + 2 + states == MOST_ARGUMENTS) FAIL("expected at most %d arguments", MOST_ARGUMENTS);
    char *name = string(member(weight, "name"));
    arguments[count++] = put(made.client, device, tensor(file, name));
    free(name);
  }
  PJRT_Buffer **last = arguments + count; /* token, length, state */
  Text inputs = inside(member(entry, "inputs")), outputs = inside(member(entry, "outputs"));
  static Array values[2 + MOST_STATE];
  Array logits = described(next(&outputs));
  Array prompt = tensor(golden, "prompt_0"), tokens = tensor(golden, "tokens_0");
  float *row = malloc((size_t)logits.bytes);
  for (size_t i = 0; i < 2 + states; i++) {
    values[i] = described(next(&inputs));
    values[i].data = i == 0 ? (char *)&token : i == 1 ? (char *)&length : calloc(1, (size_t)values[i].bytes);
    if (!values[i].data || !row || (i < 2 && values[i].bytes != 4)) FAIL("expected a batch of 1, and memory for it");
    last[i] = put(made.client, device, values[i]);
  }
  /* Row-major, whatever the device's own layout is. */
  PJRT_Buffer_MemoryLayout layout = {.struct_size = PJRT_Buffer_MemoryLayout_STRUCT_SIZE,
      .type = PJRT_Buffer_MemoryLayout_Type_Tiled, .tiled = {.struct_size = PJRT_Buffer_MemoryLayout_Tiled_STRUCT_SIZE,
      .minor_to_major = (int64_t[]){1, 0}, .minor_to_major_size = 2}};
  PJRT_ExecuteOptions options = {.struct_size = PJRT_ExecuteOptions_STRUCT_SIZE};
  for (; 4 * (length + 1) < prompt.bytes + tokens.bytes; length++) {
    int64_t at = 4 * (length + 1) - prompt.bytes; /* offset of the golden token after this one */
    if (at <= 0) memcpy(&token, prompt.data + 4 * length, 4);
    for (int i = 0; i < 2; i++) replace(&last[i], put(made.client, device, values[i]));
    CALL(step, PJRT_LoadedExecutable_Execute, .executable = compiled.executable, .options = &options, .num_devices = 1,
         .argument_lists = (PJRT_Buffer *const *const[]){arguments}, .num_args = count + 2 + states,
         .output_lists = (PJRT_Buffer **const[]){results});
    CALL(back, PJRT_Buffer_ToHostBuffer, .src = results[0], .host_layout = &layout, .dst = row,
         .dst_size = (size_t)logits.bytes);
    finish(back.event);
    for (size_t i = 1; i <= states; i++) replace(&last[i + 1], results[i]); /* frees the donated argument's handle */
    replace(&results[0], NULL);
    if (at < 0) continue;
    token = 0;
    for (int32_t i = 0; i < logits.bytes / 4; i++) {
      if (row[i] - row[i] != 0) FAIL("the logits behind %d tokens are not finite", length + 1);
      token = row[i] > row[token] ? i : token;
    }
    wrong += memcmp(&token, tokens.data + at, 4) != 0;
    printf("%d ", token);
  }
  puts(wrong ? "\nNOT the golden tokens" : "\nthe golden tokens");
  return wrong != 0;
}

int main(int count, char **argv) {
  if (count != 3 && count < 5) FAIL("usage: pjrt PLUGIN.so BUNDLE [PROGRAM TOPOLOGY [NAME=VALUE ...]]");
  void *plugin = dlopen(argv[1], RTLD_NOW), *get = plugin ? dlsym(plugin, "GetPjrtApi") : NULL;
  if (!get) FAIL("%s: expected a PJRT plugin: %s", argv[1], dlerror());
  if (chdir(argv[2])) FAIL("%s: expected the folder of a bundle", argv[2]);
  api = ((const PJRT_Api *(*)(void))get)();
  CALL(ready, PJRT_Plugin_Initialize, .extension_start = NULL);
  Text manifest = map("manifest.json");
  Text entry = member(member(manifest, "programs"), count == 3 ? "decode" : argv[3]);
  Text code = map(string(member(entry, "file")));
  PJRT_Program program = {.struct_size = PJRT_Program_STRUCT_SIZE, .code = (char *)code.at,
      .code_size = (size_t)(code.end - code.at), .format = "mlir", .format_size = 4};
  if (count == 3) return run(&program, manifest, entry);
  compile(&program, argv[4], argv + 5, count - 5);
}

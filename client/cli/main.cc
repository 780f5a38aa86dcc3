// quarry: the operator's command line.
#include <cstdio>
#include <string>
#include <vector>

#include <CLI/CLI.hpp>

#include "client/cli/commands.h"
#include "client/program_socket.h"

namespace {

// An unknown word is named: CLI11 misses the command before it looks at what it did not know.
int Exit(const CLI::App& app, const CLI::ParseError& error) {
  const std::vector<std::string> unknown = app.remaining();
  if (error.get_exit_code() != static_cast<int>(CLI::ExitCodes::RequiredError) || unknown.empty() ||
      !app.get_subcommands().empty()) {
    return app.exit(error);
  }
  std::string commands;
  for (const CLI::App* command : app.get_subcommands(nullptr)) {
    commands += (commands.empty() ? "" : ", ") + command->get_name();
  }
  std::fprintf(stderr, "quarry: %s is neither a command nor an option; commands: %s\n",
               unknown.front().c_str(), commands.c_str());
  return error.get_exit_code();
}

}  // namespace

int main(int argc, char** argv) {
  quarry::cli::Arguments a;
  CLI::App app("quarry: looks at and manages a running quarryd");
  app.require_subcommand(1);
  app.fallthrough();  // --socket and --json also behind the command
  app.add_option("--socket", a.socket, "the daemon's shared-memory socket")
      ->envname(quarry::kSocketVariable);
  app.add_flag("--json", a.json, "print JSON");

  CLI::App* status = app.add_subcommand("status", "version, uptime, tiers");
  CLI::App* contexts = app.add_subcommand("contexts", "open contexts of the caller's tenant");
  CLI::App* blocks = app.add_subcommand("blocks", "published blocks of the caller's tenant");
  blocks->add_option("--limit", a.limit, "blocks at most");
  CLI::App* pin = app.add_subcommand("pin", "keep blocks until they are unpinned");
  pin->add_option("name", a.name, "of the pin")->required();
  CLI::Option* pin_context = pin->add_option("--context", a.context, "the blocks of a context");
  pin->add_option("--block", a.blocks, "block ids in hex")->excludes(pin_context);
  pin->add_option("--ttl-ms", a.ttl_ms, "0: for good");
  CLI::App* unpin = app.add_subcommand("unpin", "end a pin");
  unpin->add_option("name", a.name, "of the pin")->required();
  CLI::App* purge = app.add_subcommand("purge", "drop cached blocks for good");
  purge->add_flag("--all", a.all, "everything of the caller's tenant");
  purge->add_option("--namespace", a.name_space, "one namespace digest in hex");
  purge->add_option("--block", a.blocks, "block ids in hex");
  CLI::App* flush =
      app.add_subcommand("flush", "wait until the tenant's blocks in RAM are on the disk");
  CLI::Option* flush_context = flush->add_option("--context", a.context, "only this context's");
  flush->add_option("--block", a.blocks, "only these, ids in hex")->excludes(flush_context);
  flush->add_option("--timeout-ms", a.timeout_ms, "at most so long");
  CLI::App* audit = app.add_subcommand(
      "audit", "errors of live answers beside exact attention, by model, layer and KV head");
  audit->add_option("--image", a.image, "also write heat maps to this file, as PNG");
  CLI::App* verify =
      app.add_subcommand("verify", "check the digests of the blocks that open contexts use");
  CLI::App* top = app.add_subcommand("top", "tiers, hit rates and latencies, refreshed");
  top->add_flag("--once", a.once, "print one frame and leave");
  top->add_option("--interval-ms", a.interval_ms, "between frames")->check(CLI::Range(50, 3600000));
  CLI::App* drain = app.add_subcommand("drain", "finish what is in flight and stop the daemon");
  app.set_version_flag("--version", QUARRY_VERSION);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    return Exit(app, error);
  }

  using namespace quarry::cli;
  absl::Status result;
  if (*status) result = ShowStatus(a);
  if (*contexts) result = ShowContexts(a);
  if (*blocks) result = ShowBlocks(a);
  if (*pin) result = Pin(a);
  if (*unpin) result = Unpin(a);
  if (*purge) result = Purge(a);
  if (*flush) result = Flush(a);
  if (*audit) result = Audit(a);
  if (*verify) result = Verify(a);
  if (*top) result = Top(a);
  if (*drain) result = Drain(a);
  if (result.ok()) return 0;
  std::fprintf(stderr, "quarry: %s\n", result.ToString().c_str());
  return 1;
}

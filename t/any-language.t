# Providers whose data path is not written in Perl. t/doc-code.t tests store.py, and t/cli-copy.t gives it
# truncated streams; this file tests store.go.
#
# One QEMU is enough: a provider sees NBD, not QEMU.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use File::Temp ();
use Test::More;

use PBA::Test::Command qw(command run_command);

my $root = "$FindBin::Bin/..";
my $dir = File::Temp->newdir('pba-language-XXXXXXXX', TMPDIR => 1);

plan(skip_all => 'no Go compiler') if !grep { -x "$_/go" } split(m/:/, $ENV{PATH});
local $ENV{GOCACHE} = "$dir/cache";
local $ENV{GO111MODULE} = 'off';
my $program = "$dir/store";
is(system('go', 'vet', "$root/examples/any-language/store.go"), 0, 'go vet reports nothing');
is(system('go', 'build', '-o', $program, "$root/examples/any-language/store.go"),
    0, 'the example is built');

# A truncated stream, as the program gets it.
open(my $script, '>', "$dir/cut") or die "$dir/cut: $!\n";
print {$script} "#!/bin/sh\nprintf 'full\\0\\0\\0\\0'\n";
close($script) && chmod(0755, "$dir/cut") or die "$dir/cut: $!\n";
my @cut = ('backup', "$dir", "$dir/index", '', 'disk', '{}', '', "$dir/cut");
isnt(system("'$program' @{[map { qq('$_') } @cut]} 2>$dir/err"), 0, 'a truncated stream: an error');
ok(!-e "$dir/index", 'a truncated stream: no index is written');

my $command = join(' ', command());
my @scfg = ('--scfg', "program=$program", '--scfg', "command=$command");
my $run = run_command('try-provider', '-I', "$root/examples/lib", 'Example::AnyLanguage', @scfg);
is($run->{status}, 0, 'try-provider passes') or diag($run->{err});
cmp_ok(scalar(() = $run->{out} =~ m/^ok /mg), '>=', 140, 'try-provider made all its tests');

done_testing;

# The usage of pve-backup-access: help, refused arguments, and that the manual, the completion and the command
# have the same options.

use v5.36;

use FindBin;
use lib "$FindBin::Bin/lib";

use Test::More;

use PBA::Test::Command qw(run_command);
use PVE::BackupAccess::CLI;

my $root = "$FindBin::Bin/..";
my $commands = PVE::BackupAccess::CLI::commands();
my %arguments
    = (DIRECTORY => '/', 'ARCHIVE...' => '/', ARCHIVE => '/vm/1/x', TARGET => '/nowhere/');

sub read_file ($file) {
    open(my $fh, '<', $file) or die "$file: $!\n";
    local $/ = undef;
    return <$fh>;
}

# The command must say in two lines what is wrong and where help is, and do nothing.
sub refused ($problem, @arguments) {
    my $run = run_command(@arguments);
    is($run->{status}, 2, "'@arguments': exit status 2");
    is($run->{out}, '', "'@arguments': no result");
    my $command = $commands->{ $arguments[0] // '' } ? " $arguments[0]" : '';
    like(
        $run->{err},
        qr/\Apve-backup-access$command: .*$problem.*\nTry 'pve-backup-access$command --help'\.\n\z/,
        "'@arguments': the error and a hint"
    );
}

subtest 'the command itself' => sub {
    like(read_file("$root/bin/pve-backup-access"), qr/\A#!.* -T$/m, 'runs in taint mode');
    for my $help (qw(-h --help help)) {
        my $run = run_command($help);
        is($run->{status}, 0, "$help: exit status");
        like($run->{out}, qr/^ +pve-backup-access \Q$_\E /m, "$help: names $_")
            for sort keys $commands->%*;
        is($run->{err}, '', "$help: no error");
    }
    like(run_command('--version')->{out}, qr/\Apve-backup-access [0-9.]+\n\z/, '--version');
    refused('no command given');
    refused(q(there is no command 'nonsense'), 'nonsense');
    refused(q(unknown option '--nonsense'), '--nonsense');
};

# The long names of a command's options.
sub options_of ($command) {
    return map { m/\A([\w-]+)/ ? $1 : () } $commands->{$command}{options}->@*;
}

my $manual = read_file("$root/bin/pve-backup-access");
my $completion = read_file("$root/completion/pve-backup-access");

for my $command (sort keys $commands->%*) {
    subtest $command => sub {
        my $spec = $commands->{$command};
        my $help = run_command($command, '--help');
        is($help->{status}, 0, 'help: exit status');
        like($help->{out}, qr/^ +pve-backup-access $command\b/m, 'help: how it is called');
        like($help->{out}, qr/--$_\b/, "help: --$_") for options_of($command);
        like($completion, qr/^        $command\) options=/m, 'completion: knows it');
        my ($words) = $completion =~ m/^        $command\) options=(.*?);;/ms;
        $words .= $completion =~ m/guest='(.*)'/ ? $1 : '' if $words =~ m/\$guest/;
        like($words, qr/--$_\b/, "completion: --$_") for options_of($command);
        my %known = map { $_ => 1 } options_of($command);
        is_deeply([grep { !$known{$_} } $words =~ m/--([\w-]+)/g], [], 'completion: no other');

        refused(q(unknown option), $command, '--nonsense');
        my @wanted = $spec->{arguments}->@*;
        refused('no ' . $wanted[0] =~ s/[.]{3}//r . ' given', $command) if @wanted;
        refused('no ' . $wanted[0] =~ s/[.]{3}//r . ' given', $command, '') if @wanted;
        my @given = map { $arguments{$_} // 'x' } @wanted;
        refused(q(one argument too many: 'y'), $command, @given, 'y')
            if !@wanted || $wanted[-1] !~ m/[.]{3}\z/;
        refused("missing: .*--$_\\b", $command, @given)
            for map { split(m/[|]/) } ($spec->{needs} // [])->@*;

        for my $option (map { m/\A([\w-]+).*=/ ? $1 : () } $spec->{options}->@*) {
            refused("option $option requires an argument", $command, @given, "--$option");
        }
    };
}

SKIP: {
    eval { require Test::Pod; 1 } or skip('no Test::Pod', 1);
    Test::Pod::pod_file_ok("$root/bin/pve-backup-access");
}

done_testing;

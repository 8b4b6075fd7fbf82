package PVE::BackupAccess::CLI;

# The command pve-backup-access, from its arguments to its exit status. Each subcommand has a module
# below this one. The options of all subcommands are listed here.

use v5.36;

use Exporter qw(import);
use File::Spec ();
use Getopt::Long ();
use IO::Handle ();
use Pod::Usage ();
use Scalar::Util qw(blessed);

use PVE::BackupAccess::CLI::Output qw(advice_on say_error say_out);

our @EXPORT_OK = qw(absolute is_bad_usage untainted usage_error);

my $name = 'pve-backup-access';

my @guest = qw(
    qmp=s libvirt=s connect=s image=s@ image-format=s uuid=s fleecing-dir=s run-dir=s qemu-user=s qemu-group=s qemu-run-dir=s
    qemu-fleecing-dir=s
);

# The subcommands: the module and function of each, its arguments ('...' means one or more), its
# options (Getopt::Long), and which options are required.
my %commands = (
    backup => {
        module => 'Backup',
        arguments => ['DIRECTORY'],
        options => [
            @guest,
            qw(ceph-conf=s ceph-user=s vmid=s guest=s device=s@ exclude=s@ target-id=s guest-config=s guest-agent=s),
            qw(bandwidth-limit=s full audit audit-every=s jobs=s compress persistent allow-shared no-check wait=s quiet|q json),
        ],
        needs => ['qmp|libvirt|image'],
    },
    restore => {
        module => 'Restore',
        arguments => ['ARCHIVE', 'TARGET'],
        options => [qw(ceph-conf=s ceph-user=s device=s format=s no-verify wait=s quiet|q json)],
    },
    serve => {
        module => 'Serve',
        arguments => ['ARCHIVE'],
        options => [qw(ceph-conf=s ceph-user=s device=s socket-dir=s wait=s json)],
    },
    mount => {
        module => 'Serve',
        function => 'mount',
        arguments => ['ARCHIVE', 'DIRECTORY'],
        options => [qw(ceph-conf=s ceph-user=s device=s wait=s json)],
    },
    list => {
        module => 'Archives',
        function => 'list',
        arguments => ['DIRECTORY'],
        options => [qw(ceph-conf=s ceph-user=s vmid=s guest=s json)],
    },
    verify => {
        module => 'Archives',
        function => 'verify',
        arguments => ['ARCHIVE...'],
        options => [qw(ceph-conf=s ceph-user=s vmid=s guest=s wait=s quiet|q json)],
    },
    prune => {
        module => 'Archives',
        function => 'prune',
        arguments => ['DIRECTORY'],
        options => [
            qw(
                keep-last=s keep-hourly=s keep-daily=s keep-weekly=s keep-monthly=s keep-yearly=s
                keep=s ceph-conf=s ceph-user=s vmid=s guest=s dry-run wait=s quiet|q json
            )
        ],
    },
    remove => {
        module => 'Archives',
        function => 'remove',
        arguments => ['ARCHIVE'],
        options => [qw(ceph-conf=s ceph-user=s wait=s quiet|q)],
    },
    status => {
        module => 'Status',
        arguments => [],
        options => [@guest, 'json'],
        needs => ['qmp|libvirt|image'],
    },
    recover => {
        module => 'Status',
        function => 'recover',
        arguments => [],
        options => [@guest, qw(target-id=s force json)],
        needs => ['qmp|libvirt|image', 'target-id'],
    },
    forget => {
        module => 'Status',
        function => 'forget',
        arguments => [],
        options => [@guest, qw(target-id=s json)],
        needs => ['qmp|libvirt|image', 'target-id'],
    },
    copy => {
        module => 'Copy',
        arguments => ['TARGET'],
        options => [
            qw(volume=s device=s status-fd=s bandwidth-limit=s connections=s request-size=s cluster-size=s),
            qw(digests=s digest-block=s unchanged=s@ without-base no-discard),
        ],
        needs => ['volume', 'device'],
    },
    regions => {
        module => 'Copy',
        function => 'regions',
        arguments => [],
        options => [qw(volume=s device=s)],
        needs => ['volume', 'device'],
    },
    map => {
        module => 'Map',
        arguments => ['DEVICE'],
        options => [@guest, qw(target-id=s json svg=s)],
        needs => ['qmp|libvirt|image'],
    },
    'try-provider' => {
        module => 'TryProvider',
        arguments => ['CLASS'],
        options => [qw(include|I=s@ scfg=s@ storage-plugin=s backup-only)],
    },
);

sub commands () { return \%commands }

# The user's arguments are as trustworthy as the user; only data from other sources stays tainted.
sub untainted ($text) {
    my ($same) = $text =~ m/\A(.*)\z/s;
    return $same;
}

# Makes a path absolute. The current directory is trusted, too.
sub absolute ($path) {
    return untainted(File::Spec->rel2abs($path));
}

my sub clean_environment () {
    delete(@ENV{qw(IFS CDPATH ENV BASH_ENV)});
    $ENV{PATH} = '/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin';
    for my $variable (qw(TMPDIR XDG_RUNTIME_DIR PBA_QEMU PBA_QEMU_IMG)) {
        $ENV{$variable} = untainted($ENV{$variable}) if defined($ENV{$variable});
    }
}

# Dies with an error in the usage of the command.
sub usage_error ($message) {
    die bless({ message => $message }, 'PVE::BackupAccess::CLI::UsageError');
}

sub is_bad_usage ($error) {
    return blessed($error) && $error->isa('PVE::BackupAccess::CLI::UsageError');
}

# ---- signals ----

# The first signal ends the work like an error, so that everything is undone. Further signals are
# ignored until then.
my $signal;
our $is_running = 0;

my sub handle_signals () {
    for my $number_of (qw(INT TERM HUP PIPE)) {
        next if $number_of eq 'HUP' && ($SIG{HUP} // '') eq 'IGNORE';    # nohup(1)
        $SIG{$number_of} = sub {
            $signal = $number_of;
            $SIG{$_} = 'IGNORE' for qw(INT TERM HUP PIPE);
            die "interrupted by SIG$number_of\n" if $is_running;
        };
    }
}

# Dies of the signal, so that the parent process sees it.
my sub die_of_signal () {
    $SIG{$signal} = 'DEFAULT';
    kill($signal => $$);
}

# ---- arguments ----

my sub parse ($command, $spec, @arguments) {
    my %options;
    my $parser
        = Getopt::Long::Parser->new(config => [qw(no_ignore_case no_auto_abbrev gnu_getopt)]);
    my @problems;
    {
        local @ARGV = @arguments;
        local $SIG{__WARN__} = sub ($text) { push(@problems, $text) };
        $parser->getoptions(\%options, 'help|h', $spec->{options}->@*);
        @arguments = @ARGV;
    }
    usage_error(lcfirst($problems[0] =~ s/\s+\z//r)) if @problems;
    return (\%options, @arguments);
}

# An option with alternatives, such as 'qmp|libvirt|image'.
my sub is_given ($options, $names) {
    return grep { defined($options->{$_}) } split(m/[|]/, $names);
}

my sub check ($spec, $options, @arguments) {
    my @wanted = $spec->{arguments}->@*;
    my $many = @wanted && $wanted[-1] =~ m/[.]{3}\z/;
    for my $i (0 .. $#wanted) {
        my $name = $wanted[$i] =~ s/[.]{3}\z//r;
        usage_error("no $name given") if !defined($arguments[$i]) || $arguments[$i] eq '';
    }
    usage_error("one argument too many: '$arguments[@wanted]'") if @arguments > @wanted && !$many;
    my @missing = map { m/[|]/ ? 'one of --' . s/[|]/, --/gr : "--$_" }
        grep { !is_given($options, $_) } ($spec->{needs} // [])->@*;
    usage_error('missing: ' . join(', and ', sort @missing)) if @missing;
    for my $option (sort keys $options->%*) {
        my $value = $options->{$option};
        usage_error("--$option must not be empty")
            if grep { $_ eq '' } ref($value) ? $value->@* : $value;
    }
    usage_error("--vmid must be a number from 1 on, not '$options->{vmid}'")
        if ($options->{vmid} // 1) !~ m/\A[1-9][0-9]{0,8}\z/;
    usage_error("--wait must be a whole number of seconds, not '$options->{wait}'")
        if ($options->{wait} // 0) !~ m/\A[0-9]{1,9}\z/;
}

# ---- help ----

my sub show_help ($command) {
    my @sections = $command ? ('-sections' => ["COMMANDS/$command"]) : ();
    Pod::Usage::pod2usage(
        -input => $0,
        -output => \*STDOUT,
        -exitval => 'NOEXIT',
        -noperldoc => 1,
        -verbose => $command ? 99 : 1,
        @sections,
    );
    return 0;
}

my sub help_for (@arguments) {
    my $command = shift(@arguments) // return show_help(undef);
    usage_error("there is no command '$command'") if !$commands{$command};
    usage_error("one argument too many: '$arguments[0]'") if @arguments;
    return show_help($command);
}

# ---- running ----

my sub run_command ($command, @arguments) {
    my $spec = $commands{$command}
        or usage_error("there is no command '$command'");
    (my $options, @arguments) = parse($command, $spec, @arguments);
    return show_help($command) if delete($options->{help});
    check($spec, $options, @arguments);
    my $has_guest = grep { $_ eq 'libvirt=s' } $spec->{options}->@*;
    if ($has_guest) {
        require PVE::BackupAccess::CLI::Guest;
        PVE::BackupAccess::CLI::Guest::reach_guest($options);
    }
    my $module = "PVE::BackupAccess::CLI::$spec->{module}";
    require($module =~ s!::!/!gr . '.pm');
    my $status = $module->can($spec->{function} // 'run')->($options, @arguments);
    PVE::BackupAccess::CLI::Guest::leave_guest($options) if $has_guest;
    return $status;
}

my sub run (@arguments) {
    my $command = shift(@arguments) // usage_error('no command given');
    return show_help(undef) if $command =~ m/\A(?:-h|--help)\z/;
    return help_for(@arguments) if $command eq 'help';
    if ($command eq '--version') {
        require PVE::BackupAccess;
        say_out("$name $PVE::BackupAccess::VERSION");
        return 0;
    }
    usage_error("unknown option '$command'") if $command =~ m/\A-/;
    return run_command($command, @arguments);
}

# What the user can do about an error from code that does not know about the command.
my sub hint_for ($command, $error) {
    return
        "Undo it by: pve-backup-access recover --target-id '$1', and this command's options for the guest."
        if $error =~ m/left its access for target '(.*)' - call recover/;
    my $advice = advice_on($error);
    return $advice if defined($advice);
    return if $command ne ' backup';
    return 'Is the guest running? If it is off, give its images by --image.'
        if $error =~ m/cannot connect to QMP socket/;
    return
        'The file system that the archives are in is full, or a quota is used up: free some space, then prune.'
        if $error
        =~ m!(?:nbd[+]unix:///image[?]|/vm/|/[.]backup-id).* (?:No space left on device|Disk quota exceeded)!;
    return;
}

# Prints the error and returns the exit status.
my sub failed ($error, @arguments) {
    my $command = $commands{ $arguments[0] // '' } ? " $arguments[0]" : '';
    if (is_bad_usage($error)) {
        say_error("$name$command: $error->{message}", "Try '$name$command --help'.");
        return 2;
    }
    say_error("$name$command: $error", hint_for($command, "$error"));
    return 1;
}

# Returns the exit status, or does not return if a signal ends the command.
sub main (@arguments) {
    @arguments = map { untainted($_) } @arguments;
    clean_environment();
    handle_signals();
    my $status = eval { local $is_running = 1; run(@arguments) };    ## bare eval: all ends here
    $status //= failed($@, @arguments) if !$signal;
    if (!$signal && !(STDOUT->flush && close(STDOUT)) && !$signal) {
        $status = failed("cannot write to standard output: $!");
    }
    if ($signal) {
        say_error("$name: interrupted by SIG$signal") if $signal ne 'PIPE';
        die_of_signal();
    }
    return $status;
}

1;

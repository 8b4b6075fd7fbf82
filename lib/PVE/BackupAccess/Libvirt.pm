package PVE::BackupAccess::Libvirt;

use v5.36;

use JSON::PP ();

use PVE::BackupAccess::Argument qw(bad_argument check_filled_text check_options check_positive);
use PVE::BackupAccess::Error;
use PVE::BackupAccess::Libvirt::Description qw(disks_of element_text is_running user_of);
use PVE::BackupAccess::Libvirt::Shell;
use PVE::BackupAccess::Try qw(attempt);

my $Error = 'PVE::BackupAccess::Error';
my $Shell = 'PVE::BackupAccess::Libvirt::Shell';
my $default_timeout = 60;

# The JSON text is passed to virsh in single quotes. virsh has no escape for a single quote inside them, so the
# text must not contain one.
my $json = JSON::PP->new->ascii->allow_nonref;

my %options = (
    connect => \&check_filled_text,
    timeout => \&check_positive,
);

# virsh takes a number for a domain's ID before it looks for a name, but libvirt assigns a new ID at each start,
# while a name stays the same. So a name takes precedence here: this returns the UUID of the domain with that
# name, if there is one.
my sub uuid_of_name ($shell, $name) {
    return $shell->run(qw(list --all --uuid --name)) =~ m/^\s*([0-9a-f-]{36})\s+\Q$name\E\s*$/m
        ? $1
        : undef;
}

# Finds an existing domain. Returns { shell, uuid, name, xml }.
my sub find ($domain, @options) {
    check_filled_text('domain', $domain);
    my $options = check_options('qmp', \@options, \%options);
    my $shell = $Shell->new($options->{connect}, $options->{timeout} // $default_timeout);
    my $same = $domain =~ m/\A[0-9]+\z/ ? uuid_of_name($shell, $domain) : undef;
    my $xml = $shell->run('dumpxml', '--domain', $same // $domain);
    my ($name, $uuid) = map { element_text($xml, $_) // '' } qw(name uuid);
    $Error->throw('ProtocolError', "virsh returned no UUID for domain '$domain'")
        if $uuid !~ m/\A[0-9a-f-]{36}\z/;
    return { shell => $shell, uuid => $uuid, name => $name, xml => $xml };
}

# Returns QEMU's reply, or dies with QEMU's error. The text of virsh's own errors is passed on.
my sub parse_reply ($command, $text) {
    my ($line) = $text =~ m/^(\{.*\})\s*$/m;
    die(($text =~ s/^error:\s*//mgr) =~ s/\s*\n\s*/ - /gr =~ s/ - \z//r . "\n") if !defined($line);
    my $reply;
    my $error = attempt { $reply = JSON::PP->new->utf8->decode($line) };
    die "virsh returned no reply from QEMU to '$command'\n" if ref($reply) ne 'HASH';
    die(($reply->{error}{desc} // 'error without a description') . "\n") if $reply->{error};
    die "virsh returned no reply from QEMU to '$command'\n" if !exists($reply->{return});
    return $reply->{return};
}

my sub code_for ($domain) {
    my ($shell, $uuid) = $domain->@{qw(shell uuid)};
    return sub ($command, $arguments) {
        my $text = $json->encode({ execute => $command, arguments => $arguments // {} });
        $text =~ s/'/\\u0027/g;
        return parse_reply($command,
            $shell->ask("qemu-monitor-command --domain $uuid --cmd '$text'"));
    };
}

sub qmp ($class, $domain, @options) {
    return code_for(find($domain, @options));
}

# ---- for the command ----

# Returns { name, uuid, running, qmp (a code ref), options (for PVE::BackupAccess->new), disks }.
sub domain ($class, $name, @options) {
    my $domain = find($name, @options);
    my $xml = $domain->{xml};
    my $is_running = is_running($xml);
    my ($user, $group) = $is_running ? user_of($xml) : ();
    return {
        $domain->%{qw(name uuid)},
        running => $is_running,
        qmp => code_for($domain),
        options => { defined($user) ? ('qemu-user' => $user, 'qemu-group' => $group) : () },
        disks => [disks_of($xml)],
    };
}

1;

__END__

=encoding utf8

=head1 NAME

PVE::BackupAccess::Libvirt - QMP commands through libvirt

=head1 SYNOPSIS

=for run libvirt

    use PVE::BackupAccess;
    use PVE::BackupAccess::Libvirt;

    my $domain = PVE::BackupAccess::Libvirt->domain('web1', connect => $uri);
    my $access = PVE::BackupAccess->new(
        qmp => $domain->{qmp},
        $domain->{options}->%*,    # qemu-user and qemu-group
        'target-id' => 'nightly',
        'fleecing-dir' => '/var/tmp',
    );

=head1 DESCRIPTION

libvirt keeps QEMU's monitor connected, and passes commands on. The first call starts a C<virsh>, which executes all
further commands; it ends with the code ref. Devices have the names that libvirt gave them, such as C<virtio-disk0>: the
C<alias> in the domain XML.

=head1 ERRORS

The methods die with a L<PVE::BackupAccess::Error>: C<ArgumentError> if an argument is unknown or wrong,
C<ConnectionError> if C<virsh> cannot be run or fails (for example because libvirt has no such domain), and
C<ProtocolError> if its answer is not valid.

=head1 CLASS METHODS

=head2 qmp

=for run libvirt

    use PVE::BackupAccess;
    use PVE::BackupAccess::Libvirt;

    my $qmp = PVE::BackupAccess::Libvirt->qmp('web1', connect => $uri);
    my $capabilities = PVE::BackupAccess->capabilities(qmp => $qmp);

Takes a domain, given by its name, UUID or ID as for C<virsh>, and options. Returns a code ref for the option C<qmp> of
L<PVE::BackupAccess/new>. The code ref dies with QEMU's or libvirt's error as text. The options are:

=over

=item C<connect> - the libvirt to connect to, a URI as for C<virsh>. The default is libvirt's own: C<qemu:///system> for
root.

=item C<timeout> - seconds that a command may take. The default is 60.

=back

If QEMU runs as another user, as that of a system domain does, give C<qemu-user> to L<PVE::BackupAccess/new>.

=head2 domain

=for run libvirt

    use PVE::BackupAccess::Libvirt;

    my $domain = PVE::BackupAccess::Libvirt->domain('web1', connect => $uri);
    say "$_->{target}: $_->{file}" for $domain->{disks}->@*;

Takes the same arguments as L</qmp>. Returns a hash that describes the domain: C<name>, C<uuid>, C<running>, C<qmp> (as
above), C<options> for L<PVE::BackupAccess/new>, and C<disks>, an array ref of hashes with C<target> (C<vda>), C<device>
(the name of the guest device), C<kind> (C<disk>, C<cdrom>), C<format>, C<file>, C<read-only> and C<shareable>.

=cut
